#define KLOSS_NAME generic_f32
#define KLOSS_BF16 0
#define KLOSS_LANES 4
#define KLOSS_ROWS 4
#include "rows.inl"
