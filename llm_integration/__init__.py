"""llm_integration"""
