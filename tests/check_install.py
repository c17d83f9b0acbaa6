"""Does an installed package work, away from its sources? ``python -I tests/check_install.py``, in the environment
that it was installed to; it needs torch besides. Every operation goes forward and backward on what serves here
and agrees with the definition; ``REPDEG_FAST_BACKEND=cpu`` insists on the compiled kernels.
``nox -s package`` runs it."""

import sys
from importlib.metadata import version
from pathlib import Path

import torch

import repdeg_fast as rf


def step(backend):
    """Of each operation the value and the gradients."""
    generator = torch.Generator().manual_seed(0)
    weight, heads, mixture = (
        torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((97, 16), (3, 11, 16), (11, 3))
    )
    target = torch.randint(97, (11,), generator=generator)
    x, branch = heads[0], heads[1]
    with rf.use_backend(backend):
        _, _, value = rf.mlm_losses_and_sample(heads, mixture, weight, target, seed=5)
        losses = {
            "cosreg": rf.cosine_regularization(weight),
            "pairwise": rf.pairwise_cosine(weight, kind="logmeanexp"),
            "linear_cross_entropy": rf.multi_layer_mlm_loss(heads, weight, target).sum(),
            "gumbel_mix": rf.gumbel_mix(heads, mixture, weight, seed=3)[1].square().sum(),
            "mlm_losses_and_sample": value.square().sum(),
            "admin_norm": rf.admin_norm(x, branch, 1.5, dropout=0.2, seed=4).pow(3).sum(),
            "contrastive": rf.contrastive_loss(x, branch),
        }
        inputs = weight, heads, mixture
        return {
            name: (loss, *torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True))
            for name, loss in losses.items()
        }


def main():
    home = Path(rf.__file__).parent
    if (home.parent / "pyproject.toml").exists():
        sys.exit(f"{home} is the source tree; run this with python -I, away from it")
    assert version("repdeg-fast") == rf.__version__
    expected, found = step("reference"), step(rf.backends.requested())
    for name, right in expected.items():
        served = rf.backends.status()[name]["cpu"]["serves"] if name in rf.backends.status() else "with the others"
        print(f"{name}: {served}")
        for one, other in zip(found[name], right, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    print(f"repdeg-fast {rf.__version__} in {home}: works")


if __name__ == "__main__":
    main()
