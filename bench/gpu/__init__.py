"""The proof on a GPU, in parts of a few minutes each: tests, then time against what else there is: `make gpu`."""
