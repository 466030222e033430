"""What an estimate will do, as plain data: where coordinates travel, what one block was seen to do, blocks' sizes."""
