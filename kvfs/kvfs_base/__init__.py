"""Words that every kvfs package shares: errors, types, wire frames and seams."""
