"""What the user names, as shards; a shard, as rows of captions and as images."""
