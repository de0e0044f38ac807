"""The units that machines are made of, each with its state, its `step` and its own tests."""
