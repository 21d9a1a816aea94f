"""Graph to graph, graph to facts: every pass of the compiler, one file each; `pipeline` runs them in order."""
