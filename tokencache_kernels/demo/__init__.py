"""The small trained diffusion transformer that ships with the package, and what is done with it."""
