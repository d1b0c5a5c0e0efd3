"""Some tokens through a whole model, against the dense model whose attention is masked by hand."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.integrations.diffusers import (
    apply_token_cache,
    remove_token_cache,
    reset_token_cache,
)
from tokencache_kernels.policies import TokenSteps, hsa, jit
from tokencache_kernels.testing.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NAMES = ["DiTTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"]
STEPS = 8
POLICIES = {
    "jit": jit(STEPS),
    "hsa": hsa(STEPS),
    "no-keys": TokenSteps((1.0, 1.0, 0.4, 0.7, 1.0, 0.3, 0.3, 0.5), keeps_keys=False),
    "filled": TokenSteps((1.0, 0.4, 0.7, 0.2, 1.0, 0.3, 0.6, 1.0), "variance", "interpolate"),
}


SCHEDULER = SimpleNamespace(alphas_cumprod=torch.linspace(0.999, 0.001, 1000))


def inputs(name, step, batch=2):
    given = FAMILIES[name].inputs(step, 0, batch)
    if "img_ids" in given:
        # 16 tokens on a 4 x 4 grid
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        given["img_ids"] = torch.stack([0 * rows, rows, columns], -1).flatten(0, 1)
    return given


def run(model, name, steps=range(STEPS), batch=2):
    with torch.no_grad():
        return torch.stack([model(**inputs(name, s, batch), return_dict=False)[0] for s in steps])


def cut(output):
    """A list of the tokens' velocities, (B, C) each, and their places."""
    if output.dim() == 3:
        return [output[:, n] for n in range(16)], [(n // 4, n % 4) for n in range(16)]
    frames = output.unsqueeze(2) if output.dim() == 4 else output
    tokens, places = [], []
    for f in range(frames.shape[2]):
        for row in range(0, frames.shape[3], 2):
            for column in range(0, frames.shape[4], 2):
                tokens.append(frames[:, :, f, row : row + 2, column : column + 2].flatten(1))
                places.append((f, row // 2, column // 2))
    return tokens, places


def paste(tokens, like):
    if like.dim() == 3:
        return torch.stack(tokens, dim=1)
    out = torch.empty_like(like.unsqueeze(2) if like.dim() == 4 else like)
    for token, place in zip(tokens, cut(like)[1], strict=True):
        f, row, column = place
        spot = out[:, :, f, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        spot.copy_(token.reshape(spot.shape))
    return out.reshape(like.shape)


def noise_level(name, timestep):
    if name.startswith("DiT"):
        return float((1 - SCHEDULER.alphas_cumprod[int(timestep)]) ** 0.5)
    return timestep if name.startswith("Flux") else timestep / 1000


def distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


def nearest(place, places, count):
    found = torch.tensor([distance(place, other) for other in places]).sort(stable=True)
    return found.values[:count], found.indices[:count]


def run_by_hand(model, name, policy, monkeypatch):
    """All tokens go through the model; chosen ones see the tokens that the policy lets them see."""
    kept, calls = {}, []
    chosen, N = None, 0
    real = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, **named):
        place = len(calls)
        calls.append(place)
        is_self = key.shape[2] == query.shape[2]
        if is_self and chosen is not None:
            text = key.shape[2] - N
            seen = torch.tensor([True] * text + [n in chosen for n in range(N)])
            if policy.keeps_keys:
                old_key, old_value = kept[place]
                key = torch.where(seen[:, None], key, old_key)
                value = torch.where(seen[:, None], value, old_value)
            else:
                attn_mask = seen.expand(query.shape[2], -1)
        if is_self:
            kept[place] = key, value
        return real(query, key, value, attn_mask=attn_mask, **named)

    outputs, velocity, full_steps, last, places = [], None, [], None, []
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        for step in range(STEPS):
            N = {"DiTTransformer2DModel": 16, "FluxTransformer2DModel": 16}.get(name, 32)
            count = max(1, round(policy.shares[step] * N))
            chosen = None
            if count < N and policy.ranking == "change":
                (new, _), (old, _) = cut(full_steps[-1]), cut(full_steps[-2])
                change = torch.stack([(a - b).pow(2).sum() for a, b in zip(new, old, strict=True)])
                chosen = set(change.topk(count).indices.tolist())
            elif count < N and velocity is None:
                chosen = {n * N // count for n in range(count)}
            elif count < N:
                before = set(range(N)) if last is None else last
                around = [nearest(place, places, 9)[1] for place in places]
                spread = torch.stack(
                    [
                        torch.stack([velocity[m] for m in list_]).var(0, unbiased=False).sum(-1)
                        .mean()
                        for list_ in around
                    ]
                )  # fmt: skip
                if count > len(before):
                    spread[list(before)] = torch.inf
                chosen = set(spread.topk(count).indices.tolist())
                chosen = before if count == len(before) else chosen
            calls.clear()
            output = run(model, name, [step])[0]
            tokens, places = cut(output)
            if chosen is None:
                full_steps.append(output)
                velocity = tokens
            elif policy.fill == "reuse":
                velocity = [tokens[n] if n in chosen else velocity[n] for n in range(N)]
            else:
                inside = sorted(chosen)
                given = inputs(name, step)
                latents = cut(given["hidden_states"])[0]
                level = noise_level(name, float(given["timestep"][0]))
                clean = [x - level * v for x, v in zip(latents, tokens, strict=True)]
                velocity = []
                for n in range(N):
                    far, near = nearest(places[n], [places[m] for m in inside], 4)
                    weights = 1 / far**2
                    mixed = sum(
                        w * clean[inside[m]]
                        for w, m in zip(weights / weights.sum(), near, strict=True)
                    )
                    lifted = (latents[n] - mixed) / level
                    velocity.append(tokens[n] if n in chosen else lifted)
            last = chosen
            outputs.append(paste(velocity, output))
    return torch.stack(outputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", POLICIES)
def test_a_subset_gives_what_the_masked_dense_model_gives(name, kind, monkeypatch):
    model = FAMILIES[name].build()
    wanted = run_by_hand(model, name, POLICIES[kind], monkeypatch)

    apply_token_cache(model, POLICIES[kind], scheduler=SCHEDULER)

    for _ in range(2):
        torch.testing.assert_close(run(model, name), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_see_the_chosen_tokens_alone(name):
    model = FAMILIES[name].build()
    blocks = model.blocks if name.startswith("Wan") else model.transformer_blocks
    seen = []
    apply_token_cache(model, POLICIES["hsa"])
    blocks[1].register_forward_pre_hook(
        lambda module, given, named: seen.append(
            (given[0] if given else named["hidden_states"]).shape[1]
        ),
        with_kwargs=True,
    )

    run(model, name)

    N = seen[0]
    assert seen == [max(1, round(share * N)) for share in POLICIES["hsa"].shares]


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_are_the_model_and_removal_gives_it_back(name):
    model = FAMILIES[name].build()
    dense = run(model, name)

    apply_token_cache(model, TokenSteps((1.0,) * STEPS))
    assert torch.equal(run(model, name), dense)
    with pytest.raises(ValueError, match="must not have a token cache yet"):
        apply_token_cache(model, POLICIES["jit"])
    remove_token_cache(model)
    apply_token_cache(model, POLICIES["hsa"])
    run(model, name, range(3))
    reset_token_cache(model)
    assert torch.equal(run(model, name, [0, 1]), dense[:2])
    assert not torch.equal(run(model, name, [2]), dense[2:3])
    remove_token_cache(model)
    assert torch.equal(run(model, name), dense)


def test_another_model_is_refused():
    with pytest.raises(UnsupportedInputError, match="must be one of DiTTransformer2DModel, Flux"):
        apply_token_cache(FAMILIES["SD3Transformer2DModel"].build(), POLICIES["jit"])


def test_noise_is_not_interpolated_without_a_scheduler():
    model = FAMILIES[NAMES[0]].build()

    with pytest.raises(UnsupportedInputError, match="scheduler must have alphas_cumprod"):
        apply_token_cache(model, POLICIES["jit"])


def test_another_batch_within_a_run_is_refused():
    model = FAMILIES[NAMES[0]].build()
    apply_token_cache(model, POLICIES["hsa"])
    run(model, NAMES[0], [0])

    with pytest.raises(Exception, match=r"the batch changed at step 1 \(was 2, now 3\)"):
        run(model, NAMES[0], [1], batch=3)
