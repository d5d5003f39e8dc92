"""intlm: recurrent language models pretrained with integers only."""
