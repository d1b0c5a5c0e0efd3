"""The answers of the cache to the calls of a transformer, its blocks and their modules."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import ops
from ...blocks import key_sites, remember_joint_attention, text_feature
from ...errors import UnsupportedInputError
from ...models import spec
from ...models.spec import Stack
from ...policies import Action, Site, Step
from . import compat
from .attention_watch import Attention, watch_attention
from .binding import attention_site, resolve, site_of
from .fused import (
    Composer,
    described_arguments,
    is_plain_attention,
    read_sources,
    self_attention_of,
)
from .interception import (
    Original,
    class_of,
    eager,
    intercept,
    interceptor_of,
    release,
    transparent,
)
from .predict import predict_scores
from .session import Call, Pass, Session


class TransformerAnswer:
    """Begins and ends the calls of a transformer."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def context(self, name: str, **place: Any) -> AbstractContextManager[None]:
        """See ``RootInterceptor``."""
        return self.session.context(name, **place)

    def forget_runs(self) -> None:
        """See ``RootInterceptor``."""
        self.session.forget_runs()

    @transparent
    def call(self, module: Any, original: Original, *arguments: Any, **named: Any) -> Any:
        """Run the transformer's own call inside a call of the cache."""
        given = _name(module, arguments, named)
        with self._calling(module, given):
            return original(*arguments, **named)

    @transparent
    def forward(self, module: Any, own: Original, *arguments: Any, **named: Any) -> Any:
        """Run or replay the transformer's own forward, inside of all hooks."""
        if self.session.call is None:
            # someone calls forward itself
            with self._calling(module, _name(module, arguments, named)):
                return self.forward(module, own, *arguments, **named)
        if self.session.graphs is None:
            return own(*arguments, **named)
        given = _name(module, arguments, named)
        return self.session.graphs.run(module, self.session.call, own, given)

    @contextmanager
    def _calling(self, transformer: Any, given: dict[str, Any]) -> Iterator[Call]:
        with self.session.calling(given) as call:
            self._prepare(transformer, call)
            yield call

    @eager
    def _prepare(self, transformer: Any, call: Call) -> None:
        session, run = self.session, call.run
        install(transformer, session)
        if run.runner.begins:
            compat.refuse_shards(transformer)
        spec_ = session.binding.spec
        if session.policy.selector.shares_guidance:
            run.note_latents(call.given.get(spec_.latents))
        if spec_.text_mask is not None:
            run.note_mask(call.given.get(spec_.text_mask))
        for name in _text_names(session):
            if call.given.get(name) is None:
                raise UnsupportedInputError(
                    f"token cache: {name} must be given to {spec_.transformer}, got None"
                )


class BlockAnswer:
    """Runs one block as the policy decides."""

    def __init__(self, session: Session, stack: Stack, layer: int) -> None:
        self.session = session
        self._stack = stack
        self._layer = layer
        binding = session.binding
        self._parts = binding.parts[stack.path][layer]
        self._sites = binding.sites(stack, layer)
        first, last = binding.spec.stacks[0], binding.spec.stacks[-1]
        self._is_first = stack is first and layer == 0
        self._is_last = stack is last and layer == binding.depth(last) - 1
        self._ends_stack = layer == binding.depth(stack) - 1
        self._described = described_arguments(stack)

    @transparent
    def call(self, module: Any, original: Original, *arguments: Any, **named: Any) -> Any:
        """Full blocks run their own code; others are composed, or run with cached modules."""
        call = self.session.call
        if call is None or call.is_ended:
            return original(*arguments, **named)
        given = _name(module, arguments, named)
        answer = self._begin(module, call, given)
        if answer is not None:
            return answer
        # its own code, which a compiler may see
        output = original(**given)
        return self._end(call, output)

    @eager
    def _begin(self, block: Any, call: Call, given: dict[str, Any]) -> Any:
        """Answer a call without the block's own code; None if that has to run."""
        session, run = self.session, call.run
        hidden_states = given[self._stack.streams[0]]
        if self._is_first:
            self._begin_step(block, call, given)
        runner = run.runner
        if runner.skips_blocks:
            return self._skip(call, given)
        is_full = runner.is_full(self._sites)
        device = hidden_states.device.type
        if (
            not is_full
            and session.fuses(self._stack, self._layer, block)
            and self._is_described(given)
            and not (device != "meta" and torch.is_autocast_enabled(device))
        ):
            sources = read_sources(self._stack, block, given, hidden_states)
            if sources is not None:
                self._compose(block, call, given, sources)
                return self._leave(call, given)
        self._leave_streams(run, given)
        call.mode = "own" if is_full else "as_is"
        return None

    def _is_described(self, given: dict[str, Any]) -> bool:
        """Whether the block is given nothing beside what its description names."""
        return all(
            name in self._described or value is None or value == {} for name, value in given.items()
        )

    def _begin_step(self, block: Any, call: Call, given: dict[str, Any]) -> None:
        session, run = self.session, call.run
        hidden_states = given[self._stack.streams[0]]
        batch = len(hidden_states)
        tokens = {}
        for name in self._stack.streams:
            rows = given[name]
            if len(rows) == 1 and batch > 1:
                # the model would repeat one prompt for all images as it goes
                given[name] = rows = rows.expand(batch, *rows.shape[1:])
            tokens[name] = rows.shape[1]
        grid = _read_grid(session.binding.spec, session.transformer, call.given)
        key = (*tokens.items(), grid)
        if key not in run.groups:
            run.groups[key] = session.binding.groups(tokens, grid, session.takes_entropy)
        predictor = session.policy.predictor

        def predict(step: Step) -> Tensor:
            assert predictor is not None, "policies that predict are refused without a predictor"
            return predict_scores(predictor, session.binding.spec, block, given, step)

        run.runner.begin_step(
            run.groups[key], batch, hidden_states.device, predict, run.is_guidance_pair
        )

    def _skip(self, call: Call, given: dict[str, Any]) -> Any:
        streams = {name: given[name] for name in self._stack.streams}
        if self._is_last:
            image = self._stack.streams[0]
            streams[image] = call.run.runner.load_output(like=streams[image])
            self._end_call(call, None)
        return self._returned(streams)

    def _compose(self, block: Any, call: Call, given: dict[str, Any], sources: Any) -> None:
        session, run, stack = self.session, call.run, self._stack
        backend = session.options.backend
        if stack.joins:
            streams = {stack.streams[0]: run.joint_stream(stack, given, backend)}
        else:
            streams = {name: run.stream(name, given[name], backend) for name in stack.streams}
        scored = session.binding.scored_sites(stack, self._layer, stack.streams[0])
        call.mode = "fused"
        Composer(
            stack, self._layer, self._parts, block, given, sources, run.runner, streams,
            run.key_lengths, session.takes_entropy,
            next(filter(run.runner.is_selected, scored), None),
        ).run()  # fmt: skip
        call.mode = "off"

    def _leave(self, call: Call, given: dict[str, Any]) -> Any:
        """What a composed block returns; streams go on behind it, up to the end of the stack."""
        run, stack = call.run, self._stack
        ends = self._ends_stack
        if stack.joins:
            text_tokens = given[stack.streams[1]].shape[1]
            streams = run.show_joint_stream(stack, text_tokens, ends)
        elif ends:
            streams = {name: run.leave_stream(name, run.streams[name].hidden_states)
                       for name in stack.streams}  # fmt: skip
        else:
            streams = {name: run.streams[name].hidden_states for name in stack.streams}
        if self._is_last:
            self._end_call(call, streams[stack.streams[0]])
        return self._returned(streams)

    def _leave_streams(self, run: Pass, given: dict[str, Any]) -> None:
        """Add everything that is pending before a block runs its own code."""
        stack = self._stack
        if stack.joins:
            given.update(run.leave_joint_stream(stack, given))
            return
        for name in stack.streams:
            given[name] = run.leave_stream(name, given[name])

    @eager
    def _end(self, call: Call, output: Any) -> Any:
        call.mode = "off"
        if self._is_last:
            returned = output if isinstance(output, tuple) else (output,)
            image = returned[self._stack.returns.index(self._stack.streams[0])]
            self._end_call(call, image)
        return output

    def _end_call(self, call: Call, output: Tensor | None) -> None:
        if output is not None:
            call.run.runner.remember_output(output)
        call.run.runner.end_step()
        call.is_ended = True

    def _returned(self, streams: dict[str, Tensor]) -> Any:
        if len(self._stack.returns) == 1:
            return streams[self._stack.returns[0]]
        return tuple(streams[name] for name in self._stack.returns)


class _ModuleAnswer:
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
        action = call.run.runner.action(self._site)
        if call.mode == "own" or action is Action.FULL:
            if call.mode == "own" and not self._takes_part(call):
                return original(*arguments, **named)
            return self._compute(call, module, original, arguments, named)
        if call.mode == "fused":
            # the composition calls the module itself, for some tokens or all
            return original(*arguments, **named)
        return self._answer(call, action, module, original, arguments, named)

    @eager
    def _takes_part(self, call: Call) -> bool:
        """Whether something of a full computation is to be kept."""
        runner = call.run.runner
        return runner.is_remembered(self._site) or runner.is_selected(self._site)

    @transparent
    def _compute(
        self, call: Call, module: Any, original: Original, arguments: Any, named: Any
    ) -> Any:
        """Compute all tokens, and keep what later steps need."""
        output = original(*arguments, **named)
        if call.mode != "fused":
            self._remember(call, output)
        return output

    @eager
    def _remember(self, call: Call, output: Any) -> None:
        call.run.runner.remember(self._site, output)

    def _answer(
        self,
        call: Call,
        action: Action,
        module: Any,
        original: Original,
        arguments: Any,
        named: Any,
    ) -> Any:
        """Answer from the cache, in a block that runs its own code."""
        raise NotImplementedError


class RowsAnswer(_ModuleAnswer):
    """Answers the calls of a function of single tokens: an MLP, a cross-attention."""

    @property
    def _scores_entropy(self) -> bool:
        return isinstance(self._part, spec.CrossAttention) and self.session.takes_entropy

    @transparent
    def _compute(
        self, call: Call, module: Any, original: Original, arguments: Any, named: Any
    ) -> Any:
        scored = self._find_scored(call) if self._scores_entropy else None
        if scored is None or not call.run.runner.is_remembered(self._site):
            return super()._compute(call, module, original, arguments, named)
        runner, backend = call.run.runner, self.session.options.backend

        def look(attention: Attention, lse: Tensor | None) -> None:
            runner.store_scores(scored, _entropy(call, attention, backend))

        output = watch_attention(
            lambda: original(*arguments, **named), look, needs_lse=False, backend=backend
        )
        if call.mode != "fused":
            self._remember(call, output)
        return output

    @eager
    def _answer(
        self,
        call: Call,
        action: Action,
        module: Any,
        original: Original,
        arguments: Any,
        named: Any,
    ) -> Any:
        runner, backend = call.run.runner, self.session.options.backend
        names, rows = _first(module, arguments, named)
        cache = runner.features.load(self._site)
        if action is Action.PARTIAL:
            indices, _ = runner.selection(self._site)
            named = {
                **names,
                **{_first_name(module): ops.gather_rows(rows, indices, backend=backend)},
            }
            scored = self._find_scored(call) if self._scores_entropy else None
            if scored is None:
                fresh = original(**named)
            else:

                def look(attention: Attention, lse: Tensor | None) -> None:
                    runner.refresh_scores(scored, indices, _entropy(call, attention, backend))

                fresh = watch_attention(
                    lambda: original(**named), look, needs_lse=False, backend=backend
                )
            _scatter(call, self._site, cache, fresh)
        return _forecast(call, self._site, cache)

    def _find_scored(self, call: Call) -> Site | None:
        sites = self.session.binding.scored_sites(self._stack, self._layer, self._part.stream)  # type: ignore[union-attr]
        return next(filter(call.run.runner.is_selected, sites), None)


class SelfAttentionAnswer(_ModuleAnswer):
    """Answers the calls of an attention among the tokens of one stream."""

    @eager
    def _takes_part(self, call: Call) -> bool:
        return True

    @transparent
    def _compute(
        self, call: Call, module: Any, original: Original, arguments: Any, named: Any
    ) -> Any:
        look = self._looks(call, _name(module, arguments, named))
        if look is None:
            return super()._compute(call, module, original, arguments, named)
        output = watch_attention(
            lambda: original(*arguments, **named), look,
            needs_lse=self.session.base_score == "attention_received",
            backend=self.session.options.backend,
        )  # fmt: skip
        if call.mode != "fused":
            self._remember(call, output)
        return output

    def _scored(self, call: Call, given: dict[str, Any]) -> list[tuple[Site | None, int]]:
        """The sites whose tokens the attention scores, with their tokens, in its sequence."""
        part = self._part
        # an attention's first argument holds its tokens, whatever it is called
        tokens = next(iter(given.values())).shape[1]
        if not isinstance(part, spec.JointAttention):
            return [(self._find_selected(call, self._stack.streams[0]), tokens)]
        joint = self._find_selected(call, spec.JOINT)
        if joint is not None:
            return [(joint, tokens + given[self._token_arguments[1]].shape[1])]
        sides = [
            (self._find_selected(call, part.image.stream), tokens),
            (self._find_selected(call, part.text.stream), given[self._token_arguments[1]].shape[1]),
        ]
        return sides[::-1] if part.is_text_first else sides

    _token_arguments = ("hidden_states", "encoder_hidden_states")

    def _find_selected(self, call: Call, stream: str) -> Site | None:
        sites = self.session.binding.scored_sites(self._stack, self._layer, stream)
        return next(filter(call.run.runner.is_selected, sites), None)

    @eager
    def _looks(
        self, call: Call, given: dict[str, Any]
    ) -> Callable[[Attention, Tensor | None], None] | None:
        """What is to be done with the attention of a full computation; None: nothing."""
        runner, session = call.run.runner, self.session
        if not runner.is_remembered(self._own_site):
            return None
        keeps_keys = runner.keeps_keys(self._own_site)
        scored = self._scored(call, given) if session.scores_attention else []
        if not keeps_keys and all(site is None for site, _ in scored):
            return None

        def look(attention: Attention, lse: Tensor | None) -> None:
            if any(site is not None for site, _ in scored):
                scores = session.score(attention, lse).split([count for _, count in scored], dim=1)
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
    def _answer(
        self,
        call: Call,
        action: Action,
        module: Any,
        original: Original,
        arguments: Any,
        named: Any,
    ) -> Any:
        runner, backend = call.run.runner, self.session.options.backend
        cache = runner.features.load(self._site)
        if action is Action.PARTIAL:
            _, rows = _first(module, arguments, named)
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
    def _answer(
        self,
        call: Call,
        action: Action,
        module: Any,
        original: Original,
        arguments: Any,
        named: Any,
    ) -> Any:
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

    def _scored(self, call: Call, given: dict[str, Any]) -> list[tuple[Site | None, int]]:
        rows = [given.get(name) for name in self._token_arguments]
        count = sum(one.shape[1] for one in rows if one is not None)
        return [(self._find_selected(call, ""), count)]

    @transparent
    def call(self, module: Any, original: Original, *arguments: Any, **named: Any) -> Any:
        """Answer a call by the mode of the block that makes it."""
        call = self.session.call
        if call is None or call.mode == "off":
            return original(*arguments, **named)
        output = None
        if call.mode != "as_is" or call.run.runner.action(self._own_site) is Action.FULL:
            output = self._compute(call, module, original, arguments, named)
        if call.mode != "as_is":
            return output
        return self._take_rows(call, output, _name(module, arguments, named))

    @eager
    def _remember(self, call: Call, output: Any) -> None:
        call.run.runner.remember(self._own_site, _joined(output))

    @eager
    def _take_rows(self, call: Call, output: Any, given: dict[str, Any]) -> Any:
        """The rows of the tokens that the last layer is going to project."""
        runner, backend = call.run.runner, self.session.options.backend
        action = runner.action(self._site)
        part = self._part
        is_pair = isinstance(part, spec.Parallel) and part.gives_pair
        if action is Action.FULL and output is not None:
            return output
        if action is Action.REUSE:
            # nothing is projected, and no attention may have been kept for that
            rows = given[next(iter(given))][:, :0]
            return (rows, rows) if is_pair else rows
        kept = runner.features.load(self._own_site) if output is None else _joined(output)
        if action is Action.FULL:
            text = given[self._token_arguments[1]].shape[1] if is_pair else 0
            return (kept[:, :-text], kept[:, -text:]) if is_pair else kept
        indices, _ = runner.selection(self._site)
        rows = ops.gather_rows(kept, indices, backend=backend)
        # a block that takes a pair joins it again
        return (rows, rows[:, :0]) if is_pair else rows


class _LayerHook:
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


class ParallelInHook(_LayerHook):
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


class ParallelOutHook(_LayerHook):
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


_KINDS: dict[type, type[_ModuleAnswer]] = {
    spec.Mlp: RowsAnswer,
    spec.CrossAttention: RowsAnswer,
    spec.SelfAttention: SelfAttentionAnswer,
    spec.JointAttention: JointAttentionAnswer,
    spec.Parallel: ParallelAttentionAnswer,
}


def install(transformer: Any, session: Session) -> None:
    """Intercept all described modules; a module that has been replaced since is found again."""
    for stack, layer, block in session.binding.blocks(transformer):
        if not _belongs(block, session):
            intercept(block, BlockAnswer(session, stack, layer))
        for part in session.binding.parts[stack.path][layer]:
            path = part.attention if isinstance(part, spec.Parallel) else part.module
            module = resolve(block, path)
            if not _belongs(module, session):
                # a wrapper of what was there: that is called as it was
                for inner in module.modules():
                    if inner is not module and _belongs(inner, session):
                        release(inner)
                intercept(module, _KINDS[type(part)](session, stack, layer, part))
            if isinstance(part, spec.Parallel):
                _put_hook(resolve(block, part.fc1), ParallelInHook(session, stack, layer, part))
                _put_hook(resolve(block, part.fc2), ParallelOutHook(session, stack, layer, part))


def _put_hook(layer: nn.Module, hook: _LayerHook) -> None:
    """Put a hook on a layer; LoRA wraps layers, and the one inside loses its hook."""
    if any(one.session is hook.session for one in _layer_hooks(layer)):
        return
    for inner in layer.modules():
        _drop_hooks(inner)
    hook.register(layer)


def _layer_hooks(module: nn.Module) -> list[_LayerHook]:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, _LayerHook)]


def _drop_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _LayerHook):
                del hooks[key]


def uninstall(transformer: nn.Module) -> None:
    """Give all modules their own classes back."""
    for module in transformer.modules():
        release(module)
        _drop_hooks(module)


def _belongs(module: nn.Module, session: Session) -> bool:
    interceptor = interceptor_of(module)
    return interceptor is not None and interceptor.session is session


def _scatter(call: Call, site: Site, cache: Tensor, fresh: Tensor) -> None:
    """Store the output of the fresh tokens, which is not forecast."""
    runner = call.run.runner
    indices, _ = runner.selection(site)
    ops.scatter_rows_(cache, indices, fresh.to(cache.dtype), backend=runner.backend)
    for difference, _ in runner.features.differences(site, runner.trend(site)):
        zeros = difference.new_zeros(*indices.shape, difference.shape[2])
        ops.scatter_rows_(difference, indices, zeros, backend=runner.backend)


def _forecast(call: Call, site: Site, cache: Tensor, feature: Site | None = None) -> Tensor:
    """A cached output, with what it is forecast to have changed by."""
    runner = call.run.runner
    for difference, factor in runner.features.differences(feature or site, runner.trend(site)):
        cache = cache + difference * factor
    return cache


def _entropy(call: Call, attention: Attention, backend: str) -> Tensor:
    return ops.attention_entropy(
        attention.query, attention.key, key_lengths=call.run.key_lengths,
        softmax_scale=attention.scale, backend=backend,
    )  # fmt: skip


def _joined(output: Any) -> Tensor:
    joined: Tensor = torch.cat(list(output), dim=1) if isinstance(output, tuple) else output
    return joined


@eager
def _name(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    if not arguments:
        return dict(named)
    return {**dict(zip(_parameters(cast(Any, class_of(module))), arguments, strict=False)), **named}


def _first(
    module: Any, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    """All arguments by name, and the first one, which holds the tokens."""
    given = _name(module, arguments, named)
    return given, given[_first_name(module)]


def _first_name(module: Any) -> str:
    return _parameters(cast(Any, class_of(module)))[0]


@cache
def _parameters(kind: Any) -> tuple[str, ...]:
    """The names of the arguments of a class's ``forward``."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _text_names(session: Session) -> tuple[str, ...]:
    """The transformer's arguments that a cross-attention needs."""
    return ("encoder_hidden_states",) if session.binding.has_cross_attention else ()


def _read_grid(
    model: spec.ModelSpec, transformer: Any, given: Mapping[str, Any]
) -> tuple[int, int] | None:
    """How the tokens of the image lie; the frames of a video lie below each other."""
    if model.grid is None:
        return None
    latents = given.get(model.latents)
    if not isinstance(latents, Tensor) or latents.dim() != (5 if model.grid.is_video else 4):
        return None
    patch = model.grid.patch
    if isinstance(patch, str):
        patch = getattr(transformer.config, patch)
    sizes = patch if isinstance(patch, (tuple, list)) else (1, patch, patch)
    height, width = latents.shape[-2] // sizes[-2], latents.shape[-1] // sizes[-1]
    frames = latents.shape[2] // sizes[0] if model.grid.is_video else 1
    return frames * height, width
