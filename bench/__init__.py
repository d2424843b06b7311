"""Speed and memory of the operations, against what else there is: `make bench`, `make bench-check`."""
