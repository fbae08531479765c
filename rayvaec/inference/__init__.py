"""What a trained model computes, for one minibatch or a whole store."""
