"""The trainable model: network, data, training and the weights that ship."""
