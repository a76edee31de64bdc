"""Sublayers are found in every decoder family, by name or by structure, and never guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, tiny
from conftest import tiny_model
from llmva.errors import UsageError
from llmva.models.sublayers import Decoder, find_decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, dtype: torch.dtype) -> None:
    row = ARCHITECTURES[name]
    model = tiny(name).to(dtype)
    decoder = find_decoder(model)
    assert [s.kind for s in decoder.sublayers] == ["attention", "mlp"] * row.blocks
    assert [s.block for s in decoder.sublayers] == [b for b in range(row.blocks) for _ in range(2)]
    assert decoder.width == 32
    modules = dict(model.named_modules())
    for sublayer in decoder.sublayers:
        assert sublayer.projection is modules[sublayer.name]
        own = row.ends_of(sublayer.block)[sublayer.kind == "mlp"]
        assert sublayer.name.endswith(f".{sublayer.block}.{own}")
        assert (sublayer.output is not sublayer.projection) == row.post_norm
        assert (sublayer.gain is not None) == row.post_norm
    assert no_hooks(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_alone_find_the_same(name: str) -> None:
    """As on the meta device, where there is nothing to prove."""
    model = tiny(name)
    assert find_decoder(model, verify=False) == find_decoder(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_add_up_to_the_final_residual_stream(name: str) -> None:
    """The meaning of `o`: embeddings plus c times the sum of all outputs is what leaves the last block."""
    model = tiny(name)
    decoder = find_decoder(model)
    seen: list[torch.Tensor] = []
    ends: list[torch.Tensor] = []
    first_block = model.get_submodule(decoder.names[0].split(".0.")[0] + ".0")

    def keep(module: Any, args: Any, output: Any) -> None:
        o = output[0] if isinstance(output, tuple) else output
        seen.append(o.reshape(1, 6, 32))

    def keep_input(module: Any, args: Any, kwargs: Any) -> None:
        ends.append(args[0] if args else kwargs["hidden_states"])

    handles = [s.output.register_forward_hook(keep) for s in decoder.sublayers]
    handles.append(first_block.register_forward_pre_hook(keep_input, with_kwargs=True))
    handles.append(
        decoder.last_block.register_forward_hook(lambda m, a, o: ends.append(o[0] if isinstance(o, tuple) else o))
    )
    model(input_ids=torch.tensor([[5, 9, 11, 6, 20, 13]]))
    for handle in handles:
        handle.remove()
    c = ARCHITECTURES[name].changes.get("residual_multiplier", 1.0)
    torch.testing.assert_close(ends[1] - ends[0], c * sum(seen), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, row in ARCHITECTURES.items() if row.post_norm])
def test_gain_is_the_post_norms_own(name: str) -> None:
    for sublayer in find_decoder(tiny(name)).sublayers:
        nn.init.normal_(sublayer.output.weight)  # type: ignore[arg-type]
        x = torch.randn(32, generator=torch.Generator().manual_seed(0))
        assert sublayer.gain is not None
        torch.testing.assert_close(sublayer.output(x), sublayer.gain * x / x.pow(2).mean().sqrt(), rtol=1e-4, atol=1e-4)


def no_hooks(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- structure -------------------------------------------------------------------------------------------------------


class Renamed(nn.Module):
    """A block of ordinary computation under names that no table holds."""

    def __init__(self, width: int, scale: float = 1.0, extra: bool = False) -> None:
        super().__init__()
        self.reader = nn.Linear(width, width)
        self.mixer_writer = nn.Linear(width, width)
        self.expander = nn.Linear(width, width)
        self.second_writer = nn.Linear(width, width)
        self.extra = nn.Linear(width, width) if extra else None
        self.scale = scale

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = hidden_states
        mixed = torch.tanh(self.reader(x)).cumsum(1)
        x = x + self.scale * self.mixer_writer(mixed)
        x = x + self.scale * self.second_writer(torch.tanh(self.expander(x)))
        return x if self.extra is None else x + self.extra(torch.tanh(x))


def with_blocks(make: Any) -> Any:
    model = tiny_model()
    torch.manual_seed(0)
    model.model.layers = nn.ModuleList(make() for _ in range(3))
    return model


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_unknown_names_are_found_by_structure(scale: float) -> None:
    decoder: Decoder = find_decoder(with_blocks(lambda: Renamed(32, scale)))
    assert decoder.names == [f"model.layers.{b}.{n}" for b in range(3) for n in ("mixer_writer", "second_writer")]


def test_a_third_writer_is_found_too() -> None:
    decoder = find_decoder(with_blocks(lambda: Renamed(32, extra=True)))
    own = ("mixer_writer", "second_writer", "extra")
    assert decoder.names == [f"model.layers.{b}.{n}" for b in range(3) for n in own]
    assert no_hooks(decoder.model)


def test_one_writer_is_enough() -> None:
    """As in Mamba; what else a block adds may stay as it is."""

    class Gated(Renamed):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            x = hidden_states + self.mixer_writer(torch.tanh(self.reader(hidden_states)))
            return x + torch.tanh(50.0 * self.second_writer(x))  # what this module puts out is not what is added

    decoder = find_decoder(with_blocks(lambda: Gated(32)))
    assert decoder.names == [f"model.layers.{b}.mixer_writer" for b in range(3)]


def test_a_norm_of_the_stream_itself_is_refused() -> None:
    class Normed(Renamed):
        def __init__(self) -> None:
            super().__init__(32)
            self.norm = nn.LayerNorm(32)

        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return self.norm(super().forward(hidden_states))

    with pytest.raises(UsageError, match="In block 0 of this llama model no module is shown to add its output"):
        find_decoder(with_blocks(Normed))


def test_a_module_that_hands_the_stream_on_is_no_writer() -> None:
    """A push at its output moves the stream too, since its output is the stream."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((32,), 0.9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x

    class Wrapped(Renamed):
        def __init__(self) -> None:
            super().__init__(32)
            self.scaled = Scaled()
            self.whole = Renamed(32)

        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return self.scaled(self.whole(hidden_states))

    own = ("whole.mixer_writer", "whole.second_writer")
    assert find_decoder(with_blocks(Wrapped)).names == [f"model.layers.{b}.{n}" for b in range(3) for n in own]


def test_what_writes_to_other_tokens_is_refused() -> None:
    class Spread(Renamed):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            x = self.mixer_writer(torch.tanh(self.reader(hidden_states)))
            return hidden_states + x + 0.5 * x.roll(1, 1)

    with pytest.raises(UsageError, match="tokens are read before their turn"):
        find_decoder(with_blocks(lambda: Spread(32)))

    class Later(Renamed):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return hidden_states + self.mixer_writer(torch.tanh(self.reader(hidden_states))).cumsum(1)

    with pytest.raises(UsageError, match="no module is shown to add its output"):
        find_decoder(with_blocks(lambda: Later(32)))


def test_a_block_that_runs_again_is_refused() -> None:
    model = tiny_model()
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)
    with pytest.raises(UsageError, match="an edit would act several times"):
        find_decoder(model)


def test_a_projection_whose_output_is_changed_gives_way_to_what_is_added() -> None:
    """Names alone would take this model: its projection is followed by something the residual stream sees."""
    model = tiny_model()
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda m, a, o: torch.tanh(50.0 * o))
    assert {s.name.split(".", 3)[3] for s in find_decoder(model).sublayers} == {"self_attn.o_proj", "mlp"}
    assert len(find_decoder(model, verify=False).sublayers) == 6


def test_known_names_in_the_wrong_place_give_way_to_structure() -> None:
    """`self_attn.o_proj` and `mlp.down_proj` exist here, but write nothing: two others do."""

    class Misleading(Renamed):
        def __init__(self) -> None:
            super().__init__(32)
            self.self_attn, self.mlp = nn.Module(), nn.Module()
            self.self_attn.o_proj, self.mlp.down_proj = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            self.self_attn.o_proj(hidden_states)
            self.mlp.down_proj(hidden_states)
            return super().forward(hidden_states)

    names = find_decoder(with_blocks(Misleading)).names
    assert names[:2] == ["model.layers.0.mixer_writer", "model.layers.0.second_writer"]


def test_no_list_of_blocks_is_refused() -> None:
    model = tiny_model()
    model.config.num_hidden_layers = 5
    model.model.blocks = nn.ModuleList(Renamed(32) for _ in range(4))
    with pytest.raises(UsageError, match="blocks of this llama model cannot be told apart"):
        find_decoder(model)


def test_hooks_go_when_the_probe_fails() -> None:
    class Broken(Renamed):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            raise RuntimeError("broken block")

    model = with_blocks(lambda: Broken(32))
    with pytest.raises(RuntimeError, match="broken block"):
        find_decoder(model)
    assert no_hooks(model)


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_a_token_with_massive_activations_does_not_hide_what_a_block_adds(scale: float) -> None:
    """As the first token of Qwen2.5-Coder-0.5B in bfloat16: its updates are lost in rounding, others are not."""

    class Massive(Renamed):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            x = super().forward(hidden_states)
            massive = torch.zeros_like(x)
            massive[:, 0, 3] = 1597.0
            return x + massive

    decoder = find_decoder(with_blocks(lambda: Massive(32, scale)).to(torch.bfloat16))
    assert decoder.names == [f"model.layers.{b}.{n}" for b in range(3) for n in ("mixer_writer", "second_writer")]
