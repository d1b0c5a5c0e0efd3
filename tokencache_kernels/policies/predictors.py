"""TokenCache's predictors: how much each token of each block matters in a step (its score)."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import fail
from .files import load_safetensors, replace_file

FORMAT = "tokencache_kernels predictor 1"
_MLP_RATIO = 4


class Predictor(nn.Module):
    """Scores every token for every block, once a step, in [0, 1]; 1 is worth computing.

    Attributes:
        importance: (T, L, N), the result of calibration: for each step and block the mean score of
            a sample's best token, of its second best, and so on. NaN before calibration. It decides
            *how many* tokens a block computes, as sizes must be known before the sample is.
    """

    def __init__(self, num_layers: int, num_tokens: int, num_steps: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.num_tokens = num_tokens
        self.num_steps = num_steps
        self.importance: Tensor
        self.register_buffer(
            "importance", torch.full((num_steps, num_layers, num_tokens), torch.nan)
        )

    def arguments(self) -> dict[str, int]:
        """The arguments that build a predictor of the same shape."""
        return {name: getattr(self, name) for name in ("num_layers", "num_tokens", "num_steps")}

    def __repr__(self) -> str:
        """One line: it stands in policies, records and messages."""
        arguments = ", ".join(f"{name}={value}" for name, value in self.arguments().items())
        return f"{type(self).__name__}({arguments})"

    @property
    def flops(self) -> int:
        """The FLOPs of scoring one sample, a multiply-add being 2."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, conditioning: Tensor, step: int | Tensor) -> Tensor:
        """Score the tokens.

        Args:
            hidden_states: (B, N, D), the input of the first block.
            conditioning: (B, D), the embedding of timestep and class that modulates that block.
            step: the index of the step, or (B,) int64 for samples at different steps.

        Returns:
            (L, B, N) float32 in [0, 1].
        """
        raise NotImplementedError

    @torch.no_grad()
    def step_importance(self) -> tuple[float, ...]:
        """The mean importance of each step, as the percentile schedule wants it."""
        return tuple(self.importance.double().mean(dim=(1, 2)).tolist())


class TablePredictor(Predictor):
    """One weight for each step, block and position, whatever the sample (TokenCache v1)."""

    def __init__(self, num_layers: int, num_tokens: int, num_steps: int) -> None:
        super().__init__(num_layers, num_tokens, num_steps)
        self.logits = nn.Parameter(torch.zeros(num_steps, num_layers, num_tokens))

    @property
    def flops(self) -> int:
        """Nothing is computed."""
        return 0

    def forward(self, hidden_states: Tensor, conditioning: Tensor, step: int | Tensor) -> Tensor:
        """Look the scores up; see ``Predictor``."""
        scores = self.logits[step].float().sigmoid()
        if scores.dim() == 2:
            return scores[:, None].expand(-1, hidden_states.shape[0], -1)
        return scores.transpose(0, 1)


class ContentPredictor(Predictor):
    """A light DiT block over the tokens, and one sigmoid score per block (TokenCache v2).

    With ``width`` equal to ``hidden`` the block has the shape of the model's own first block and
    can start from its weights; a narrower one is cheaper and begins with a projection.
    """

    def __init__(
        self,
        num_layers: int,
        num_tokens: int,
        num_steps: int,
        hidden: int,
        width: int,
        num_heads: int,
    ) -> None:
        super().__init__(num_layers, num_tokens, num_steps)
        self.hidden = hidden
        self.width = width
        self.num_heads = num_heads
        is_narrow = width != hidden
        self.embed = nn.Linear(hidden, width) if is_narrow else nn.Identity()
        self.condition = nn.Linear(hidden, width) if is_narrow else nn.Identity()
        self.modulation = nn.Linear(width, 6 * width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.project = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, _MLP_RATIO * width)
        self.fc2 = nn.Linear(_MLP_RATIO * width, width)
        self.score = nn.Linear(width, num_layers)
        # every score begins at one half, and the block as the identity unless it is given weights
        for layer in (self.modulation, self.score):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def arguments(self) -> dict[str, int]:
        """See ``Predictor``."""
        own = {name: getattr(self, name) for name in ("hidden", "width", "num_heads")}
        return {**super().arguments(), **own}

    @property
    def flops(self) -> int:
        """The block's and the projections'; see ``Predictor``."""
        width = self.width
        per_token = (8 + 4 * _MLP_RATIO) * width * width + 4 * self.num_tokens * width
        if width != self.hidden:
            per_token += 2 * self.hidden * width
        return self.num_tokens * (per_token + 2 * width * self.num_layers)

    def forward(self, hidden_states: Tensor, conditioning: Tensor, step: int | Tensor) -> Tensor:
        """Run the block; ``step`` speaks through the conditioning. See ``Predictor``."""
        dtype = self.score.weight.dtype
        x = self.embed(hidden_states.to(dtype))
        vectors = self.modulation(F.silu(self.condition(conditioning.to(dtype))))
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors[:, None].chunk(6, dim=-1)
        x = x + gate1 * self._attend(_modulate(x, shift1, scale1))
        hidden = F.gelu(self.fc1(_modulate(x, shift2, scale2)), approximate="tanh")
        x = x + gate2 * self.fc2(hidden)
        logits = self.score(F.layer_norm(x, (self.width,), eps=1e-6))
        return logits.float().permute(2, 0, 1).contiguous().sigmoid()

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.project(mixed.transpose(1, 2).flatten(2))


def rank_scores(scores: Tensor) -> Tensor:
    """The mean over the samples of a sample's best score, its second best, ...: (L, N).

    Args:
        scores: (L, B, N).
    """
    return scores.sort(dim=-1, descending=True).values.mean(dim=1)


def save_predictor(predictor: Predictor, path: Path) -> None:
    """Write a table or content predictor as safetensors; the file is there as a whole or not."""
    from safetensors.torch import save

    facts = json.dumps({"kind": type(predictor).__name__, **predictor.arguments()})
    state = {name: value.cpu().contiguous() for name, value in predictor.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, save(state, {"format": FORMAT, "facts": facts}))


def load_predictor(path: str | Path) -> Predictor:
    """Load a file written by ``save_predictor``. Nothing in a file is ever executed.

    Raises:
        ValueError: the file is truncated, or is no predictor of ours.
        FileNotFoundError: there is no such file.
    """
    state, metadata = load_safetensors(path, "load_predictor", "path", FORMAT)
    try:
        facts = json.loads(metadata["facts"])
        predictor: Predictor = _KINDS[facts.pop("kind")](**facts)
        predictor.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError):
        fail("load_predictor", "path", "hold the predictor that its metadata describes", path)
    return predictor.eval().requires_grad_(False)


_KINDS: dict[str, type[TablePredictor] | type[ContentPredictor]] = {
    kind.__name__: kind for kind in (TablePredictor, ContentPredictor)
}


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift
