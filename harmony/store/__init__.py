"""The store: interface, NATS JetStream, memory."""
