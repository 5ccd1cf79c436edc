"""The ops: one file each, holding definition, registration, gradient and public function."""
