"""One trial as a journalled state machine; scenarios and limits."""
