"""Forecasters: a model is a function from history [batch, time, variable] to an Output with .prediction."""
