"""The C++ backend: attention over the kept pairs on the CPU, by the widest vectors there are."""
