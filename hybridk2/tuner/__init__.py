"""From one's own prompts to a placement of experts: recorded, replayed, chosen, shown."""
