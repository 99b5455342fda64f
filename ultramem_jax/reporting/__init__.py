"""What every report needs: tables in Markdown, and where its numbers were measured."""
