"""What everything stands on: the mesh (`sharding`), the product with a weight (`linear`),
`dropout`, what is published of `devices`, the fields of a `config`. Knows nothing of attention."""
