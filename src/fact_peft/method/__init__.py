"""The mathematics: the stack of slices, its decompositions, and one layer's product. No PEFT in it."""
