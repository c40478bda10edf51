"""What is measured and published with the machine that it was measured on."""
