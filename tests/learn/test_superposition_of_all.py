"""Recording and blending on a tiny model of every described class."""

import pytest
import torch

from tokencache_kernels.learn.superposition import Superposition, find_sublayers
from tokencache_kernels.testing.families import FAMILIES

# diffusers deprecates parts of its own models
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def call(model, name, step):
    options = {"return_dict": False} if hasattr(model, "config") else {}
    output = model(**FAMILIES[name].inputs(step, 0, 2), **options)
    output = output[0] if options else output
    return torch.stack(output) if isinstance(output, list) else output


@pytest.mark.parametrize("name", FAMILIES)
def test_blending_is_the_model_at_one_and_what_was_recorded_at_zero(name):
    model = FAMILIES[name].build()
    sublayers = find_sublayers(model)
    dense = call(model, name, 1)
    superposition = Superposition(model)
    with superposition.recording():
        call(model, name, 0)
    kept = {sublayers[site]: output for site, output in superposition.features.items()}

    with superposition.blending(dict.fromkeys(sublayers, torch.tensor(1.0))):
        fresh = call(model, name, 1)
    weights = {site: torch.tensor(0.5, requires_grad=True) for site in sublayers}
    with superposition.blending(weights):
        call(model, name, 1).square().mean().backward()
    with superposition.blending(dict.fromkeys(sublayers, torch.tensor(0.0))):
        stale = call(model, name, 1)
    superposition.remove()
    # independently: every module answers with what was kept
    handles = [
        module.register_forward_hook(lambda module, *_: kept[module])
        for module in sublayers.values()
    ]
    wanted = call(model, name, 1)
    for handle in handles:
        handle.remove()

    torch.testing.assert_close(fresh, dense, rtol=0, atol=0)
    torch.testing.assert_close(stale, wanted, rtol=1e-6, atol=1e-6)
    assert not torch.equal(stale, dense)
    gradients = [weight.grad for weight in weights.values()]
    assert any(gradient is not None and gradient != 0 for gradient in gradients)
    assert all(gradient is None or gradient.isfinite() for gradient in gradients)
