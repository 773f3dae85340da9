"""Slices and layouts: the algebra on names and shapes."""

import pytest

from fact_peft.method.tensorization import describe_layout, tensorize


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


def test_a_part_owns_its_slices_only():
    slices = tensorize({"qkv": (8, 24), "wide": (8, 48), "fc": (8, 8)}, {"qkv": "qv", "wide": "kv"})
    assert [owned.places for owned in slices.values()] == [
        [0, None, 1],
        [None, None, 2, 3, 4, 5],
        [6],
    ]
    assert [owned.count for owned in slices.values()] == [2, 4, 1]


def test_a_narrowing_layer_in_part_is_row_major_over_what_it_owns():
    (owned,) = tensorize({"qkv": (16, 24)}, {}).values()  # sides that do not divide: one slice
    assert owned.places == [0]
    with pytest.raises(ValueError, match="qkv has 16 inputs and 24 outputs"):
        tensorize({"qkv": (16, 24)}, {"qkv": "q"})


def test_blocks_that_share_nothing_are_stacks_of_their_own():
    layers = ["vit.layers.0.q", "vit.layers.0.fc", "vit.layers.1.q", "encoder.encoder_layer_10.mlp.0"]
    slices = tensorize(dict.fromkeys(layers, (8, 8)), share="block")
    assert [(owned.stack, owned.first) for owned in slices.values()] == [
        ("8x8@vit-layers-0", 0),
        ("8x8@vit-layers-0", 1),
        ("8x8@vit-layers-1", 0),
        ("8x8@encoder-encoder_layer_10", 0),
    ]


@pytest.mark.parametrize(
    ("layers", "said"), [(["head"], "head lies in none"), (["a-b.0.q", "a.b.0.q"], "a.b.0.q lies in 'a.b.0', hardly")]
)
def test_blocks_that_cannot_be_told_apart_are_refused(layers, said):
    with pytest.raises(ValueError, match=said):
        tensorize(dict.fromkeys(layers, (8, 8)), share="block")
