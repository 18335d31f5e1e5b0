"""How a kernel is measured: clocks, memory, launches, the test gate, and the rows that are written."""
