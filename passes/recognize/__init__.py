"""Recognition of attention in any spelling: products, softmax, scores, layouts, projections, masks, latents, heads."""
