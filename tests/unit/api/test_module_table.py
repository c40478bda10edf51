"""Modules and their sizes as a short text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_api.module_table import (
    MAX_MODULES,
    ModuleGroup,
    ModuleTableError,
    SizedModule,
    join_path,
    read_module_table,
    write_module_table,
)

LAYER = [
    ("self_attn.q_proj", 64, 32, True, True, True, False),
    ("self_attn.k_proj", 16, 32, False, True, True, False),
    ("self_attn.v_proj", 16, 32, False, True, True, False),
    ("input_layernorm", 32),
]


def named(path: str, *modules: tuple[object, ...]) -> list[SizedModule]:
    return [SizedModule(join_path(path, str(name)), *size) for name, *size in modules]  # type: ignore[arg-type]


def expanded(text: str) -> list[SizedModule]:
    return sorted(
        SizedModule(
            join_path(layer, each.name),
            *(each.outputs, each.inputs, each.bias, each.quantizable, each.adaptable, each.shared),
        )
        for group in read_module_table(text)
        for layer in group.layers
        for each in group.modules
    )


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        pytest.param([SizedModule("wte", 5)], ":wte=5", id="model"),
        pytest.param([SizedModule("lm_head", 9, 5, shared=True)], ":lm_head=9x5t", id="tied"),
        pytest.param(
            [each for number in range(3) for each in named(f"model.layers.{number}", *LAYER)],
            "model.layers.0-2:self_attn.q_proj=64x32bqa,self_attn.k_proj|self_attn.v_proj=16x32qa,input_layernorm=32",
            id="layers",
        ),
        pytest.param(
            [SizedModule(f"h.{number}.mlp", 7) for number in (0, 2, 3, 4, 9)], "h.0+2-4+9:mlp=7", id="some-layers"
        ),
        pytest.param(
            [SizedModule(f"h.{layer}.experts.{expert}.w", 8, 4) for layer in (1, 2) for expert in range(4)],
            "h.1-2.experts.0-3:w=8x4",
            id="experts",
        ),
        pytest.param(
            [
                SizedModule(f"h.{layer}.e.{expert}.w", 8, 4)
                for layer, count in ((0, 1), (1, 2))
                for expert in range(count)
            ],
            "h.0.e.0:w=8x4;h.1.e.0-1:w=8x4",
            id="uneven",
        ),
        pytest.param([SizedModule("conv.0", 3), SizedModule("conv.1", 3)], "conv.0-1:=3", id="list-of-modules"),
    ],
)
def test_modules_are_written_by_the_layers_that_have_them(modules: list[SizedModule], text: str) -> None:
    assert write_module_table(modules) == text
    assert expanded(text) == sorted(modules)


def test_group_that_is_read_has_paths_of_layers() -> None:
    assert read_module_table("h.0-1:mlp=7") == (ModuleGroup(("h.0", "h.1"), (SizedModule("mlp", 7),)),)


paths = st.lists(st.sampled_from(["model", "h", "0", "1", "2", "10", "q_proj"]), min_size=1, max_size=5).map(".".join)
flags = st.booleans()


@given(
    st.lists(
        st.builds(SizedModule, paths, st.integers(1, 3), st.integers(0, 2), flags, flags, flags, flags),
        unique_by=lambda module: module.name,
        min_size=1,
    )
)
def test_any_modules_are_read_as_they_were_written(modules: list[SizedModule]) -> None:
    assert expanded(write_module_table(modules)) == sorted(modules)


@pytest.mark.parametrize("name", ["", "a:b", "a;b", "a,b", "a=b", "a|b", "a b", "h.0-1", "ü", "a..b", "h.00.a", "2d.a"])
def test_name_that_the_text_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(ModuleTableError, match="it has a module named"):
        write_module_table([SizedModule(name, 1)])


@pytest.mark.parametrize(
    "text",
    [
        *("", ";", ":", "wte=5", ":wte", ":wte=", ":wte=x5", ":wte=5y", ":wte=-5", ":wte=1e9", ":wte=5x", ":a=1,,b=2"),
        *("h.0-:a=1", "h.-1:a=1", "h.0+:a=1", "h.2-x:a=1", ":wte=٣", ":wte=999999999999999", "h.0:a=1;", "\ud800:a=1"),
    ],
)
def test_text_that_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(ModuleTableError):
        read_module_table(text)


@pytest.mark.parametrize("part", ["1", "a", "1-1", "1+", "a|"])
def test_text_of_many_parts_that_is_no_table_is_refused_at_once(part: str) -> None:
    with pytest.raises(ModuleTableError):
        read_module_table(".".join([part] * 600))


@pytest.mark.parametrize(
    "text",
    [
        f"h.0-{MAX_MODULES}:a=1",
        "h.0-999999:a=1",
        "h.0-999.e.0-999:a=1",
        "h." + "+".join(["0-999"] * 30) + ":a=1",
        "h.0-9999:" + ",".join(["a=1"] * 3),
    ],
)
def test_table_of_more_modules_than_any_model_has_is_refused(text: str) -> None:
    with pytest.raises(ModuleTableError, match=r"more than|it has layers"):
        read_module_table(text)


@given(st.text(alphabet="h.0129-+:;,=|xbqat\n ", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        groups = read_module_table(text)
    except ModuleTableError:
        return
    assert all(group.layers and group.modules for group in groups)
