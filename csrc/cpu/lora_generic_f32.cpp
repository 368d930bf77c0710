#define KLOSS_NAME generic_f32
#define KLOSS_BF16 0
#define KLOSS_ROWS 2
#include "lora.inl"
