"""Training and calibration: routers, predictors and step tables for a model and a sampler."""
