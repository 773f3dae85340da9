"""Slices and layouts of layers of any names and shapes."""

import pytest

from fact_peft.method.tensorization import describe_layout, read_layout, slice_shape, stack_sizes, tensorize

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

sides = st.integers(1, 40)
shapes = st.dictionaries(
    st.from_regex(r"[a-c](\.[0-3]\.[a-c]){0,2}", fullmatch=True), st.tuples(sides, sides), min_size=1, max_size=12
)
in_any_time = settings(deadline=None)  # a busy machine may stop a process for longer than hypothesis allows


@in_any_time
@given(shapes)
def test_slices_tile_every_layer(linear_shapes):
    for name, slices in tensorize(linear_shapes).items():
        assert (slices.in_features, slices.out_features) == linear_shapes[name]
        assert slices.count * slices.in_width * slices.out_width == slices.in_features * slices.out_features


@in_any_time
@given(shapes)
def test_slices_fill_every_stack_without_gap_or_overlap(linear_shapes):
    slices = tensorize(linear_shapes)
    owned: dict[str, list[int]] = {}
    for layer in slices.values():
        owned.setdefault(layer.stack, []).extend(range(layer.first, layer.first + layer.count))
    assert {stack: sorted(positions) for stack, positions in owned.items()} == {
        stack: list(range(size)) for stack, size in stack_sizes(slices.values()).items()
    }


@in_any_time
@given(shapes)
def test_slices_are_square_exactly_where_the_sides_divide(linear_shapes):
    for in_features, out_features in linear_shapes.values():
        short, long = sorted((in_features, out_features))
        in_width, out_width = slice_shape(in_features, out_features)
        assert (in_width == out_width) == (long % short == 0)


@in_any_time
@given(shapes, shapes)
def test_layouts_are_equal_only_for_equal_layers(one, other):
    assert (describe_layout(one) == describe_layout(other)) == (list(one.items()) == list(other.items()))


@in_any_time
@given(shapes, st.sampled_from(["q", "k", "v", "qk", "qv", "kv"]))
def test_a_layout_is_read_back_in_order(linear_shapes, part):
    parts = dict.fromkeys(list(linear_shapes)[::2], part)
    shapes_read, parts_read = read_layout(describe_layout(linear_shapes, parts))
    assert list(shapes_read.items()) == list(linear_shapes.items()) and parts_read == parts
