"""The measurement of torch's boundary: every side is the same op, with gradients where they are asked for."""

import torch

from bench import boundary


def test_all_sides_do_the_same(capsys):
    args = boundary.arguments()
    for name, op in boundary.sides().items():
        y, s, keys = op(*args)
        assert (y.shape, s.shape, keys.shape) == ((8, 16), (8, 4), (8,)), name
        grads = torch.autograd.grad(y, (args[0], args[3], args[4]), torch.ones(8, 16))
        assert [grad.shape for grad in grads] == [(8, 16), (2, 4, 16), (2, 16, 4)], name
    assert boundary.main(["--calls", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
