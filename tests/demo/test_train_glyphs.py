import json

import pytest
import torch
from safetensors.torch import load_file

from tokencache_kernels.demo.train_glyphs import (
    CHARACTERS,
    FONTS,
    build_glyph_model,
    draw_glyphs,
    flow_loss,
    main,
    sample_glyphs,
)


def draw(count, size=24, seed=0):
    return draw_glyphs(count, size, torch.Generator().manual_seed(seed))


def test_pictures_have_two_colours_a_shape_and_their_label():
    images, labels = draw(40)

    assert images.shape == (40, 3, 24, 24)
    assert images.abs().max() <= 1
    assert labels.min() >= 0
    assert labels.max() < len(CHARACTERS)
    for image in images:
        corner_free = (image - image[:, :1, :1]).abs().amax()
        assert corner_free > 0.3
    again, _ = draw(40)
    assert torch.equal(images, again)
    assert not torch.equal(images, draw(40, seed=1)[0])


@pytest.mark.parametrize("font", FONTS)
def test_every_font_has_every_character(font):
    from tokencache_kernels.demo.train_glyphs import _render

    for character in CHARACTERS:
        mask = _render(font, character, 64)
        assert max(mask.shape) <= 64
        assert mask.max() > 0.5


def test_the_loss_of_the_exact_velocity_is_nothing():
    images, labels = draw(3)

    class Exact(torch.nn.Module):
        def forward(self, mixed, timestep, class_labels):
            times = timestep[:, None, None, None] / 1000
            noise = (mixed - (1 - times) * images) / times
            return type("Output", (), {"sample": noise - images})

    loss = flow_loss(Exact(), images, labels, torch.Generator().manual_seed(0))

    assert loss < 1e-8


def test_sampling_is_eulers_method_whatever_the_other_seeds_are():
    torch.manual_seed(0)
    model = build_glyph_model(8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))

    both = sample_glyphs(model, [1, 2], [5, 6], steps=3)

    torch.testing.assert_close(
        sample_glyphs(model, [2], [6], steps=3), both[1:], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="seeds must be 2, got 1"):
        sample_glyphs(model, [1, 2], [5], steps=3)


def test_a_short_training_writes_weights_and_record(tmp_path):
    out = tmp_path / "glyphs.safetensors"

    main(
        [
            *("--steps", "2", "--batch", "2", "--size", "8", "--device", "cpu"),
            *("--out", str(out), "--state", str(tmp_path / "state.safetensors")),
        ]
    )

    model = build_glyph_model(8)
    model.load_state_dict({name: value.float() for name, value in load_file(out).items()})
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["steps"] == 2
    assert len(record["loss_by_step"]) >= 1
