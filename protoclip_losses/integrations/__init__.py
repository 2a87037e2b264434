"""The codebases ProtoLoss is dropped into: one module per host, which imports its host when it is imported itself."""
