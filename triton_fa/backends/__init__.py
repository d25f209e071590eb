"""Ways of computing attention. Each module exports `BACKEND`."""
