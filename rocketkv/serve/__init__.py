"""`rocketkv serve`: an OpenAI-compatible server over one patched model; a long text is read once and asked often."""
