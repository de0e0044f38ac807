"""What is measured on an NVIDIA card: `sparseloom bench --device cuda` and what lies behind it."""
