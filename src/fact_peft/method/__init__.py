"""The mathematics, without PEFT: the stack of slices, its decompositions, and the products of one layer."""
