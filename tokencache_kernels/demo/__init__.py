"""The small trained diffusion transformer that ships with the package, and its experiments."""
