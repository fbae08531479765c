"""Inference with a trained model, on one minibatch or a whole store."""
