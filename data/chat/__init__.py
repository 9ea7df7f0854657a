"""Chats: from the messages of a record to token ids and which of them are learned."""
