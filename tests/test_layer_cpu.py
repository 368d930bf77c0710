"""A layer as one autograd function has the bits of its ops one by one."""

from dataclasses import replace

import pytest
import torch

from bench.whole_step import make_step
from kloss.kernels import attention_lists, layer_cpu, make_segments
from kloss.kernels.cpu_library import built
from kloss.models import TINY, AdapterBank

pytestmark = pytest.mark.skipif(not built(), reason="csrc is not built")
WIDTHS = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_hidden_layers": 2}
SIZES = replace(TINY, **WIDTHS, vocab_size=50, num_labels=7)
AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@pytest.fixture
def served(monkeypatch):
    """Counts the layers that the one function serves; `allowed` = False sends them to the ops."""

    class Served:
        allowed, layers = True, 0

    real = layer_cpu.serves

    def serves(*call):
        answer = Served.allowed and real(*call)
        Served.layers += answer
        return answer

    monkeypatch.setattr(layer_cpu, "serves", serves)
    return Served


@pytest.mark.parametrize("dropout", [0.3, 0.0], ids=["dropout", "none"])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("ranks", [4, (4, 1, 3)], ids=["one rank", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_has_the_bits_of_the_ops_one_by_one(served, dtype, ranks, exact, dropout):
    if dtype == torch.bfloat16 and not AVX512:
        pytest.skip("this processor computes bf16 in fp32")
    results = []
    for served.allowed in (False, True):
        step = make_step(SIZES, 3, 4, 3, dropout=dropout, dtype=dtype)
        bank = AdapterBank(step.model, 3, ranks, alpha=2.0, dtype=dtype, exact=exact)
        bank.param.add_(torch.linspace(-1e-2, 1e-2, bank.param.shape[1]))  # B is not zero
        bank.refresh()
        step = step._replace(bank=bank)
        results.append([*step.run(), *step.run(), bank.param.clone(), bank.exp_avg.clone()])
    assert served.layers == (4 if dtype == torch.float32 or AVX512 else 0)
    assert results[0][1].isfinite().all() and all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_and_the_gradient_of_the_input_have_the_bits_of_the_ops(served, dtype):
    if dtype == torch.bfloat16 and not AVX512:
        pytest.skip("this processor computes bf16 in fp32")
    step = make_step(SIZES, 3, 4, 3, dropout=0.0, dtype=dtype)
    cu_seqlens = torch.tensor([0, 5, 5, 9], dtype=torch.int32)
    segments = make_segments(cu_seqlens, torch.tensor([2, 0, -1], dtype=torch.int32), 3)
    results = []
    for served.allowed in (False, True):
        x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        call = cu_seqlens, attention_lists(cu_seqlens, x), segments, step.bank, None
        y, _ = step.model.layers[1](x, x, *call)
        y.float().square().sum().backward()
        with torch.no_grad():
            scored, _ = step.model.layers[1](x, x, *call)
        results.append([y.detach(), x.grad, scored])
    assert served.layers == 2
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_what_does_not_fit_goes_to_the_ops(served):
    step = make_step(SIZES, 3, 4, 3, dropout=0.1, dtype=torch.float32)
    step.model.layers[0].norm_1.weight.requires_grad_()  # not frozen
    step.run()
    assert served.layers == 1
    partly = AdapterBank(step.model, 3, 4, targets=("qkv", "up"))
    step._replace(bank=partly).run()
    assert served.layers == 1
    with torch.autocast("cpu"):
        step.run()
    assert served.layers == 1
