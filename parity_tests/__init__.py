"""The harness that holds every backend against the float64 reference: python -m parity_tests."""
