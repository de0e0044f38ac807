"""What every cycle-level machine is built on: compiled steps, FIFOs, and one event log."""
