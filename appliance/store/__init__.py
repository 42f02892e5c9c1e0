"""The index of sealed bundles: SQLite, migrations, queries, reindex."""
