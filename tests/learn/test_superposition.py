"""Recording and blending on a real DiT: at weights 1 and 0 it is the model, or the cached model."""

import pytest
import torch

from tokencache_kernels.errors import CacheMissError, UnsupportedInputError
from tokencache_kernels.learn.superposition import Superposition, find_sublayers
from tokencache_kernels.policies import Site
from tokencache_kernels.testing import randn, tiny_dit


def run(model, step):
    timestep = torch.full((2,), 900 - 100 * step)
    return model(
        randn(2, 2, 8, 8, seed=10 + step), timestep=timestep, class_labels=torch.arange(2)
    ).sample


def constant_weights(model, value):
    return dict.fromkeys(find_sublayers(model), torch.tensor(value))


def test_the_sublayers_are_named_in_the_order_in_which_they_run():
    assert list(find_sublayers(tiny_dit(num_layers=2))) == [
        Site("main", 0, "attn"), Site("main", 0, "mlp"),
        Site("main", 1, "attn"), Site("main", 1, "mlp"),
    ]  # fmt: skip


def test_with_weight_one_the_model_is_dense():
    model = tiny_dit()
    dense = run(model, 1)

    superposition = Superposition(model)
    with superposition.recording():
        recorded = run(model, 0)
    with superposition.blending(constant_weights(model, 1.0)):
        blended = run(model, 1)

    torch.testing.assert_close(blended, dense, rtol=0, atol=0)
    assert not torch.allclose(recorded, dense)


def test_with_weight_zero_every_sublayer_returns_what_was_recorded():
    model = tiny_dit()
    superposition = Superposition(model)
    with superposition.recording():
        run(model, 0)
    recorded = superposition.features

    outputs = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, site=site: outputs.update({site: out}))
        for site, module in find_sublayers(model).items()
    ]
    with superposition.blending(constant_weights(model, 0.0)):
        run(model, 1)
    for handle in handles:
        handle.remove()

    assert len(recorded) == 6
    for site, feature in recorded.items():
        torch.testing.assert_close(outputs[site], feature, rtol=0, atol=0)


def test_only_the_sublayers_named_are_blended():
    model = tiny_dit()
    superposition = Superposition(model)
    with superposition.recording():
        run(model, 0)
    outputs = []
    handle = model.transformer_blocks[1].ff.register_forward_hook(
        lambda _, __, out: outputs.append(out)
    )

    with superposition.blending({Site("main", 1, "mlp"): torch.tensor(0.0)}):
        some = run(model, 1)
    handle.remove()

    assert not torch.equal(some, run(model, 1))
    torch.testing.assert_close(outputs[0], superposition.features[Site("main", 1, "mlp")])


@pytest.mark.parametrize("shape", [(), (16,), (2, 16)], ids=str)
def test_every_weight_gets_the_gradient_that_a_small_change_of_it_shows(shape):
    model = tiny_dit().double()
    superposition = Superposition(model)

    def run64(step):
        latents = randn(2, 2, 8, 8, seed=step).double()
        timestep = torch.full((2,), 900 - 100 * step)
        return model(latents, timestep=timestep, class_labels=torch.arange(2)).sample

    with superposition.recording(), torch.no_grad():
        run64(0)
    weights = {
        site: torch.rand(shape, dtype=torch.float64).requires_grad_()
        for site in find_sublayers(model)
    }

    def loss():
        with superposition.blending(weights):
            return run64(1).square().mean()

    loss().backward()

    step = 1e-5
    for weight in weights.values():
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                weight += sign * step
                values.append(loss())
                weight -= sign * step
        torch.testing.assert_close(
            weight.grad.sum(), (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-9
        )


def test_without_hooks_the_model_is_as_before():
    model = tiny_dit()
    before = run(model, 0)
    superposition = Superposition(model)
    with superposition.recording():
        run(model, 1)

    superposition.remove()

    assert superposition.features == {}
    assert not any(module._forward_hooks for module in find_sublayers(model).values())
    torch.testing.assert_close(run(model, 0), before, rtol=0, atol=0)


def test_blending_what_was_not_recorded_is_refused():
    superposition = Superposition(tiny_dit())

    with (
        pytest.raises(CacheMissError, match=r"module='mlp'.* must be recorded first, got nothing"),
        superposition.blending({Site("main", 0, "mlp"): torch.tensor(0.5)}),
    ):
        pass


def test_another_model_is_refused():
    with pytest.raises(UnsupportedInputError, match=r"transformer must be one of .*, got Linear"):
        Superposition(torch.nn.Linear(2, 2))
