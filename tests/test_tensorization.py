"""Slices and layouts: the algebra on names and shapes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from fact_peft.method.tensorization import describe_layout, read_layout, slice_shape, stack_sizes, tensorize

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
@given(shapes)
def test_a_layout_is_read_back_in_order(linear_shapes):
    assert list(read_layout(describe_layout(linear_shapes)).items()) == list(linear_shapes.items())


def test_vit_layout_is_one_line():
    block = {"attention.q_proj": (8, 8), "mlp.fc1": (8, 32), "mlp.fc2": (32, 8)}
    layers = {f"vit.layers.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    assert describe_layout(layers) == ["vit.layers.0-11: attention.q_proj 8x8, mlp.fc1 8x32, mlp.fc2 32x8"]


def test_layout_keeps_the_order_of_layers():
    layers = {"a.0.q": (8, 8), "a.0.k": (8, 8)}
    assert describe_layout(layers) != describe_layout(dict(reversed(layers.items())))


def test_up_and_down_projections_own_four_slices_each_and_qkv_three():
    slices = tensorize({"qkv": (8, 24), "up": (8, 32), "down": (32, 8), "odd": (8, 12)})
    assert [(layer.stack, layer.first, layer.num_in_blocks, layer.num_out_blocks) for layer in slices.values()] == [
        ("8x8", 0, 1, 3),
        ("8x8", 3, 1, 4),
        ("8x8", 7, 4, 1),
        ("8x12", 0, 1, 1),
    ]
