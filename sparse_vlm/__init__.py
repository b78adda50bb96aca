"""sparse_vlm"""
