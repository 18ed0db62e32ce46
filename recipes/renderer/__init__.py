"""Training of the renderer: autoencoder, latents, diffusion decoders (P 3.4)."""
