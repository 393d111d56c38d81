"""What everything stands on: the mesh (`sharding`), the product with a weight (`linear`),
`dropout`, and what is published of `devices`. Knows nothing of attention."""
