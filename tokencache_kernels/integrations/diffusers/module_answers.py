"""The answers of the cache to the calls of a block's modules."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...blocks import Layers, key_sites, remember_joint_attention, text_feature
from ...errors import UnsupportedInputError
from ...models import spec
from ...models.spec import Stack
from ...policies import Action, Site
from . import compat
from .arguments import ModuleCall
from .attention_watch import Attention, watch_attention
from .binding import attention_site, site_of
from .fused import is_plain_attention, mlp_of, self_attention_of
from .interception import Original, eager, transparent
from .session import Call, Session


class ModuleAnswer:
    """Answers the calls of one cached module of a block."""

    def __init__(self, session: Session, stack: Stack, layer: int, part: spec.Part) -> None:
        self.session = session
        self._stack = stack
        self._layer = layer
        self._part = part
        self._site = site_of(stack, part, layer)

    @transparent
    def call(self, module: Any, original: Original, *arguments: Any, **named: Any) -> Any:
        """Answer a call by the mode of the block that makes it."""
        call = self.session.call
        if call is None or call.mode == "off":
            return original(*arguments, **named)
        made = ModuleCall(module, original, arguments, named)
        action = call.run.runner.action(self._site)
        if call.mode == "own" or action is Action.FULL:
            if call.mode == "own" and not self._takes_part(call):
                return made.run()
            return self._compute(call, made)
        if call.mode == "fused":
            return self._compose(call, action, made)
        return self._answer(call, action, made)

    @eager
    def _takes_part(self, call: Call) -> bool:
        """Tell whether a full computation is to be kept in part."""
        runner = call.run.runner
        return runner.is_remembered(self._site) or runner.is_selected(self._site)

    @transparent
    def _compute(self, call: Call, made: ModuleCall) -> Any:
        """Compute all tokens, and keep the features for later steps."""
        output = made.run()
        if call.mode != "fused":
            self._remember(call, output)
        return output

    @eager
    def _remember(self, call: Call, output: Any) -> None:
        call.run.runner.remember(self._site, output)

    @transparent
    def _compose(self, call: Call, action: Action, made: ModuleCall) -> Any:
        """Run for a composition, which calls the module itself, for some tokens or all."""
        return made.run()

    def _answer(self, call: Call, action: Action, made: ModuleCall) -> Any:
        """Answer from the cache, in a block that runs its own code."""
        raise NotImplementedError


class RowsAnswer(ModuleAnswer):
    """Answers the calls of a function of single tokens: an MLP, a cross-attention."""

    @property
    def _scores_entropy(self) -> bool:
        return isinstance(self._part, spec.CrossAttention) and self.session.takes_entropy

    @transparent
    def _compute(self, call: Call, made: ModuleCall) -> Any:
        scored = self._find_scored(call) if self._scores_entropy else None
        if scored is None or not call.run.runner.is_remembered(self._site):
            return super()._compute(call, made)
        runner, backend = call.run.runner, self.session.options.backend

        def look(attention: Attention, lse: Tensor | None) -> None:
            runner.store_scores(scored, _entropy(call, attention, backend))

        output = watch_attention(made.run, look, needs_lse=False, backend=backend)
        if call.mode != "fused":
            self._remember(call, output)
        return output

    @eager
    def _compose(self, call: Call, action: Action, made: ModuleCall) -> Any:
        return self._score(call, made.run) if action is Action.PARTIAL else made.run()

    def _score(self, call: Call, attend: Callable[[], Any]) -> Any:
        """Compute the selected tokens, and keep their scores if the attention gives some."""
        runner, backend = call.run.runner, self.session.options.backend
        scored = self._find_scored(call) if self._scores_entropy else None
        if scored is None:
            return attend()
        indices, _ = runner.selection(self._site)

        def look(attention: Attention, lse: Tensor | None) -> None:
            runner.refresh_scores(scored, indices, _entropy(call, attention, backend))

        return watch_attention(attend, look, needs_lse=False, backend=backend)

    @eager
    def _answer(self, call: Call, action: Action, made: ModuleCall) -> Any:
        runner, backend = call.run.runner, self.session.options.backend
        cache = runner.features.load(self._site)
        if action is Action.PARTIAL:
            indices, _ = runner.selection(self._site)
            layers = self._find_layers(made, cache)
            if layers is not None:
                hidden = layers.expand(made.tokens, indices, backend)
                layers.store_(cache, indices, hidden, backend=backend)
                _forget_changes(call, self._site)
            else:
                rows = ops.gather_rows(made.tokens, indices, backend=backend)
                _scatter(call, self._site, cache, self._score(call, partial(made.run_on, rows)))
        return _forecast(call, self._site, cache)

    def _find_layers(self, made: ModuleCall, cache: Tensor) -> Layers | None:
        """The layers of an MLP that the ops may take; None: the module is called."""
        rows = made.tokens
        device = rows.device.type
        if not isinstance(self._part, spec.Mlp) or self.session.options.tier == "as_is":
            return None
        if rows.dtype != cache.dtype or (device != "meta" and torch.is_autocast_enabled(device)):
            return None
        layers = mlp_of(made.module, self._part.layers).layers
        return None if layers is None or layers.fc1.weight.dtype != rows.dtype else layers

    def _find_scored(self, call: Call) -> Site | None:
        sites = self.session.binding.scored_sites(self._stack, self._layer, self._part.stream)  # type: ignore[union-attr]
        return next(filter(call.run.runner.is_selected, sites), None)


class SelfAttentionAnswer(ModuleAnswer):
    """Answers the calls of an attention among the tokens of one stream."""

    @eager
    def _takes_part(self, call: Call) -> bool:
        return True

    @transparent
    def _compute(self, call: Call, made: ModuleCall) -> Any:
        look = self._looks(call, made)
        if look is None:
            return super()._compute(call, made)
        output = watch_attention(
            made.run, look,
            needs_lse=self.session.base_score == "attention_received",
            backend=self.session.options.backend,
        )  # fmt: skip
        if call.mode != "fused":
            self._remember(call, output)
        return output

    def _scored(self, call: Call, made: ModuleCall) -> list[tuple[Site | None, int]]:
        """The sites whose tokens the attention scores, with their tokens, in its sequence."""
        part = self._part
        tokens = made.tokens.shape[1]
        if not isinstance(part, spec.JointAttention):
            selected = self._find_selected(call, self._stack.streams[0])
            return [(selected, len(made.tokens) * tokens // call.run.runner.batch)]
        text_tokens = made.given[self._token_arguments[1]].shape[1]
        joint = self._find_selected(call, spec.JOINT)
        if joint is not None:
            return [(joint, tokens + text_tokens)]
        sides = [
            (self._find_selected(call, part.image.stream), tokens),
            (self._find_selected(call, part.text.stream), text_tokens),
        ]
        return sides[::-1] if part.is_text_first else sides

    def _unfold(self, call: Call, scores: Tensor) -> Tensor:
        """Give each sample the scores of all its tokens, which attended in several sequences."""
        folds = getattr(self._part, "folds", "none")
        if folds == "none":
            return scores
        B, length = call.run.runner.batch, scores.shape[1]
        if folds == "frames":
            return scores.reshape(B, -1)
        return scores.reshape(B, -1, length).transpose(1, 2).reshape(B, -1)

    _token_arguments = ("hidden_states", "encoder_hidden_states")

    def _find_selected(self, call: Call, stream: str) -> Site | None:
        sites = self.session.binding.scored_sites(self._stack, self._layer, stream)
        return next(filter(call.run.runner.is_selected, sites), None)

    @eager
    def _looks(
        self, call: Call, made: ModuleCall
    ) -> Callable[[Attention, Tensor | None], None] | None:
        """Return the use of a full computation's attention, or None."""
        runner, session = call.run.runner, self.session
        if not runner.is_remembered(self._own_site):
            return None
        keeps_keys = runner.keeps_keys(self._own_site)
        scored = self._scored(call, made) if session.scores_attention else []
        if not keeps_keys and all(site is None for site, _ in scored):
            return None

        def look(attention: Attention, lse: Tensor | None) -> None:
            if any(site is not None for site, _ in scored):
                all_scores = self._unfold(call, session.score(attention, lse))
                scores = all_scores.split([count for _, count in scored], dim=1)
                for (site, _), of_site in zip(scored, scores, strict=True):
                    if site is not None:
                        runner.store_scores(site, of_site)
            if keeps_keys:
                seen = attention.key, attention.value
                for key_site, rows in zip(key_sites(self._own_site), seen, strict=True):
                    runner.features.store(key_site, rows.flatten(2))

        return look

    @property
    def _own_site(self) -> Site:
        return self._site

    @eager
    def _answer(self, call: Call, action: Action, made: ModuleCall) -> Any:
        runner, backend = call.run.runner, self.session.options.backend
        cache = runner.features.load(self._site)
        if action is Action.PARTIAL:
            module, rows = made.module, made.tokens
            indices, _ = runner.selection(self._site)
            if not is_plain_attention(module):
                raise UnsupportedInputError(
                    "token cache: to recompute some tokens of a self-attention, its processor must "
                    "be diffusers' AttnProcessor2_0, without fused projections or norms of "
                    f"queries and keys, got {compat.attention_processor(module)}"
                )
            attention = self_attention_of(module, backend)
            variant = runner.decision(self._site).attention
            if variant == "kv_all":
                attention.kv_all_(cache, indices, rows)
            else:
                packed = ops.gather_rows(rows, indices, backend=backend)
                if variant == "sel_only":
                    attention.sel_only_(cache, indices, packed)
                else:
                    split = (attention.num_heads, attention.head_dim)
                    keys, values = (
                        runner.features.load(site, like=cache).unflatten(-1, split)
                        for site in key_sites(self._site)
                    )
                    attention.kv_cache_(cache, keys, values, indices, packed)
        return _forecast(call, self._site, cache)


class JointAttentionAnswer(SelfAttentionAnswer):
    """Answers the calls of an attention among the tokens of two streams."""

    @eager
    def _remember(self, call: Call, output: Any) -> None:
        if len(output) != 2:
            raise UnsupportedInputError(
                "token cache: a joint attention must give two outputs, of image and text, got "
                f"{len(output)}; adapters that add one, such as IP-Adapter, are not supported"
            )
        image, text = output
        remember_joint_attention(call.run.runner, self._site, image, text)

    @eager
    def _answer(self, call: Call, action: Action, made: ModuleCall) -> Any:
        runner = call.run.runner
        return tuple(
            _forecast(call, self._site, runner.features.load(feature), feature)
            for feature in (self._site, text_feature(self._site))
        )


class ParallelAttentionAnswer(SelfAttentionAnswer):
    """Answers the calls of the attention of a parallel block, which its last layer projects."""

    @property
    def _own_site(self) -> Site:
        return attention_site(self._stack, self._layer)

    def _find_selected(self, call: Call, stream: str) -> Site | None:
        return self._site if call.run.runner.is_selected(self._site) else None

    def _scored(self, call: Call, made: ModuleCall) -> list[tuple[Site | None, int]]:
        given = made.given
        rows = [given.get(name) for name in self._token_arguments]
        count = sum(one.shape[1] for one in rows if one is not None)
        return [(self._find_selected(call, ""), count)]

    @transparent
    def call(self, module: Any, original: Original, *arguments: Any, **named: Any) -> Any:
        """Answer a call by the mode of the block that makes it."""
        call = self.session.call
        if call is None or call.mode == "off":
            return original(*arguments, **named)
        made, output = ModuleCall(module, original, arguments, named), None
        if call.mode != "as_is" or call.run.runner.action(self._own_site) is Action.FULL:
            output = self._compute(call, made)
        if call.mode != "as_is":
            return output
        return self._take_rows(call, output, made)

    @eager
    def _remember(self, call: Call, output: Any) -> None:
        call.run.runner.remember(self._own_site, _joined(output))

    @eager
    def _take_rows(self, call: Call, output: Any, made: ModuleCall) -> Any:
        """The rows of the tokens that the last layer is going to project."""
        runner, backend = call.run.runner, self.session.options.backend
        action = runner.action(self._site)
        part = self._part
        is_pair = isinstance(part, spec.Parallel) and part.gives_pair
        if action is Action.FULL and output is not None:
            return output
        if action is Action.REUSE:
            # nothing is projected, and no attention may have been kept for that
            rows = made.tokens[:, :0]
            return (rows, rows) if is_pair else rows
        kept = _joined(output) if output is not None else _load(call, self._own_site)
        if action is Action.FULL:
            text = made.given[self._token_arguments[1]].shape[1] if is_pair else 0
            return (kept[:, :-text], kept[:, -text:]) if is_pair else kept
        indices, _ = runner.selection(self._site)
        rows = ops.gather_rows(kept, indices, backend=backend)
        # a block that takes a pair joins it again
        return (rows, rows[:, :0]) if is_pair else rows


class LayerHook:
    """A hook on a linear layer of a parallel block.

    Other libraries tell linear layers by their class, which is therefore left alone.
    """

    def __init__(self, session: Session, stack: Stack, layer: int, part: spec.Part) -> None:
        self.session = session
        self._site = site_of(stack, part, layer)

    def register(self, module: nn.Module) -> None:
        """Put the hook on a layer."""
        raise NotImplementedError

    def _find_call(self) -> tuple[Call, Action] | None:
        """The call under way, and the site's action; None if the layer runs as it is."""
        call = self.session.call
        if call is None or call.mode in ("off", "fused"):
            return None
        return call, call.run.runner.action(self._site)


class ParallelInHook(LayerHook):
    """Gives the first layer of a parallel MLP the rows of some tokens."""

    def register(self, module: nn.Module) -> None:
        """Put the hook on the layer."""
        module.register_forward_pre_hook(self.before)

    @eager
    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> Any:
        """Take the rows of the fresh tokens."""
        found = self._find_call()
        if found is None or found[1] is Action.FULL:
            return None
        call, action = found
        rows = arguments[0]
        if action is Action.REUSE:
            return (rows[:, :0],)
        runner = call.run.runner
        indices, _ = runner.selection(self._site)
        return (ops.gather_rows(rows, indices, backend=runner.backend),)


class ParallelOutHook(LayerHook):
    """Puts the output of a parallel block's last layer into the cache, and gives it out."""

    def register(self, module: nn.Module) -> None:
        """Put the hook on the layer."""
        module.register_forward_hook(self.behind)

    @eager
    def behind(self, module: nn.Module, arguments: Any, output: Tensor) -> Any:
        """Keep all rows, or scatter the fresh ones."""
        found = self._find_call()
        if found is None:
            return None
        call, action = found
        runner = call.run.runner
        if action is Action.FULL:
            runner.remember(self._site, output)
            return None
        cache = runner.features.load(self._site)
        if action is Action.PARTIAL:
            _scatter(call, self._site, cache, output)
        return _forecast(call, self._site, cache)


def _scatter(call: Call, site: Site, cache: Tensor, fresh: Tensor) -> None:
    """Store the output of the fresh tokens, which is not forecast."""
    runner = call.run.runner
    indices, _ = runner.selection(site)
    ops.scatter_rows_(cache, indices, fresh.to(cache.dtype), backend=runner.backend)
    _forget_changes(call, site)


def _forget_changes(call: Call, site: Site) -> None:
    """Forecast no change of the fresh tokens."""
    runner = call.run.runner
    indices, _ = runner.selection(site)
    for difference, _ in runner.differences(site):
        zeros = difference.new_zeros(*indices.shape, difference.shape[2])
        ops.scatter_rows_(difference, indices, zeros, backend=runner.backend)


def _forecast(call: Call, site: Site, cache: Tensor, feature: Site | None = None) -> Tensor:
    """Return a cached output for the block, with its forecast change."""
    differences = call.run.runner.differences(site, feature)
    if not differences:
        return call.run.loans.lend(feature or site, cache)
    for difference, factor in differences:
        cache = cache + difference * factor
    return cache


def _load(call: Call, site: Site) -> Tensor:
    """A cached output for the block."""
    return call.run.loans.lend(site, call.run.runner.features.load(site))


def _entropy(call: Call, attention: Attention, backend: str) -> Tensor:
    return ops.attention_entropy(
        attention.query, attention.key, key_lengths=call.run.key_lengths,
        softmax_scale=attention.scale, backend=backend,
    )  # fmt: skip


def _joined(output: Any) -> Tensor:
    joined: Tensor = torch.cat(list(output), dim=1) if isinstance(output, tuple) else output
    return joined
